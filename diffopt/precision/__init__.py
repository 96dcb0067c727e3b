"""Computing in 16 bits, with islands in float32."""
