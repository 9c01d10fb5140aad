"""Trees of files as tar streams, for both ends of `insula cp`: the daemon's and the command line's.

    pack.py      a file or tree below an open directory → tar
    unpack.py    tar → files below an open directory
    sparse.py    files with holes in tar archives

The owner of the files may change them meanwhile, and an archive may be hostile. So no path of several components is
passed to the kernel: every step opens one name in an open directory and follows no link, and a new file gets its owner
and mode through its descriptor. Nothing recurses, and the number of open files does not depend on the depth of a tree.
Only the standard library is used.
"""
