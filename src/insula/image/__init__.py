"""OCI images: names, manifests, a content-addressed store, and layers made into directories for overlayfs.

    limits      what an image from outside may cost
    job         work that can be cancelled
    reference   what people call an image: registry/repository:tag@digest
    manifest    the JSON documents of the image-spec, read strictly
    tar         a strict, bounded reader of tar archives
    layer       a layer tar made into a directory as overlayfs wants it; nothing escapes
    worker      the child process in which that happens
    confine     what such a process may still do
    platform    what this machine runs
    blobs       files named by the sha256 of their content
    staging     temporary directories that vanish with their owner
    archive     OCI layouts and docker-archives, read and written
    registry    pull and push, through skopeo(1)
    builtin     busybox, and Debian by debootstrap(8)
    store       ImageStore, which joins them

Everything that comes in from outside is hostile until its digest was verified, and still hostile after that:
a digest says who it is, not that it is good.
"""
