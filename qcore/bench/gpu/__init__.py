"""``qcore bench gpu``: what the kernels should take on a GPU, and what they do.

``devices`` holds the public figures of a few GPUs, ``model`` the bytes and operations of each kernel and the time that
follows, ``measure`` times the same workloads on the GPU that is here.
"""
