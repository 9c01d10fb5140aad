"""System call filters; seccomp(2), and `linux.seccomp` of the OCI runtime-spec.

compiler.py   from a profile to a program
bpf.py        assembling the program: classic BPF
cache.py      compiled programs in a directory, by profile
load.py       loading a program into the calling thread
"""
