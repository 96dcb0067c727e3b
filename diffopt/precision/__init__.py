"""Computing in 16 bits: which values, and which islands stay in float32."""
