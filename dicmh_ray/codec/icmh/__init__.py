"""Diff-ICMH (arXiv 2511.22549): one stream for machines and, through a diffusion prior, for people.

    image ──VAE──> z ──lfgcm(image, z)──> y, z symbols ──frame──> bitstream (with the tags)
    bitstream ──lfgcm──> c, the estimate of z ──VAE──> machine view
                         c ──controlled U-Net(tags), diffusion──> z ──VAE──> human view

The same classes hold the official checkpoints at full width (:mod:`.convert` turns them into
checkpoint directories) and small networks of our own training. Their attribute names in
:mod:`.lfgcm` are the keys of the official checkpoints, which are the interchange format.
"""
