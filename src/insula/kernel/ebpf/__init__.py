"""eBPF programs; bpf(2).

assembler.py   instructions to bytes
load.py        loading, attaching and finding programs
trace.py       programs that run when a kernel function is called
btf.py         the kernel's types (BTF), for offsets of fields
"""
