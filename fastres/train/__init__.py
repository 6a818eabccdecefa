"""Trains networks. config holds the options, data the images, batches their order, optimize the
optimizer and schedule, checkpoints the files, report what is shown; loop joins them in ``fit``.

A run is a function of its options, its data and the weights that it starts from: order and
augmentation depend on (seed, epoch, index) alone, so an interrupted run goes on to the same bits.
"""
