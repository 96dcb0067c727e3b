"""Compares engines with other packages that cache features: same schedule, images and times.

`pairs` lists the packages' caches, each with the pass that is the same, `pipelines` makes their
contenders, `schedules` finds the layers that each step computes, `measure` compares images and
times, and `document` writes the section of docs/caching.md.
"""
