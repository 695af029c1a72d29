"""Captions of the figures that every training has, as templates by file name; see `report.captioned`."""

TRAINING_CAPTIONS = {
    "loss_curves": (
        "Training and validation loss against training step ({steps} steps), with learning rate and gradient norm "
        "where logged. Look for a validation loss that rises again (overfitting) and for jumps in the gradient norm "
        "(instability)."
    ),
    "time_shares": (
        "Time of this training by activity (total {seconds:.0f} s). A large share of waiting for data means that "
        "reading, and not the model, limits the speed."
    ),
    "profile": (
        "Time per training step by kind of operation, from a trace of some steps, summed over concurrent threads;"
        " percentages refer to that sum. Look for a single operation that dominates."
    ),
}
