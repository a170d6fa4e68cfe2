"""Operations of the study, each in four versions side by side: reference, Triton, CUDA, CPU C++.

A folder is an operation: ``from kernels.rms_norm import rms_norm``; ``rms_norm(x, w, impl="cpu")``.
Importing compiles nothing: a kernel is built when it is first called, and kept in the user's cache.
"""
