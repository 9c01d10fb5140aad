"""OCI images: names, manifests, a content-addressed store, and layers extracted for overlayfs.

    limits      limits of size, files and time for an image from outside
    job         work that can be cancelled
    reference   names of images: registry/repository:tag@digest
    manifest    the JSON documents of the image-spec, read strictly
    tar         a strict, bounded reader of tar archives
    layer       extraction of a layer's tar into a directory for overlayfs
    worker      the child process that extracts
    confine     the confinement of that process
    platform    the architecture of this machine
    blobs       files named by the sha256 of their content
    staging     temporary directories that are removed when their owner ends
    archive     reading and writing OCI layouts and docker-archives
    image_import   import of an image: verify its blobs and extract its layers
    registry    pull and push, through skopeo(1)
    builtin     busybox, and Debian by debootstrap(8)
    store       ImageStore, which joins them

All data from outside is hostile, also after its digest was verified: a digest identifies content, and does not make it
harmless.
"""
