"""Trees of files as tar streams, for both ends of `insula cp`: the daemon's and the command line's.

    pack.py      a file or tree below an open directory → tar
    unpack.py    tar → files below an open directory
    sparse.py    files with holes, as tar archives have them

Whoever owns the files may change them meanwhile, and an archive may say anything. So nothing here hands a path of
several components to the kernel: every step opens one name in an open directory and follows no link, and what was made
is given its owner and mode through its descriptor. Nothing recurses, and the number of open files does not depend on
how deep a tree is. Only the standard library is used.
"""
