"""Captions of the figures of a classification, as templates by file name; see `report.captioned`."""

CAPTIONS = {
    "comparison": (
        "Figures of merit on {images} images in {groups} groups ({data}). Dots: estimates; lines: 95 % bootstrap "
        "intervals over groups. Blue: the run; grey: its baselines, and the variants that were trained for comparison "
        "({methods} rows). Where a baseline lies to the right of the run, or within its interval, the run is no "
        "better than the baseline on these images. Rows with random splits (leaks) overestimate the performance."
    ),
    "roc_curves": (
        "ROC (left) and precision-recall curves (right) for the class {positive} on {images} images in {groups} groups "
        "({data}). Thick: the run; thin: its baselines; dotted: chance; curves are averaged over repeats of the "
        "cross-validation, and the band, if any, spans the repeats. Curves closer to the upper left (ROC) and upper "
        "right (precision-recall) are better."
    ),
    "confusion_matrix": (
        "Number of images by true class (rows) and predicted class (columns), for {images} images of {classes} classes "
        "({data}; mean over repeats), with the percentage of each row. Darker: larger percentage. Correct predictions "
        "are on the diagonal; large entries off it show which classes are confused."
    ),
    "reliability": (
        "Above: fraction of correct predictions (accuracy) against the predicted probability of the class "
        "(confidence), for {images} images ({data}) in bins of equal width, with 95 % intervals. Filled: calibrated "
        "probabilities; open, if shown: probabilities before calibration; dashed: perfect calibration. Below: number "
        "of predictions in each bin. Points below the diagonal are overconfident, points above it underconfident; bins "
        "with few predictions say little."
    ),
    "saliency_right": (
        "{shown} of {total} correctly classified images ({data}), the most confident ones spread over the classes. "
        "Left: the image; right: overlaid with the saliency of the predicted class, scaled to the maximum of each "
        "image, so that colours cannot be compared between images. Above and below each: file; predicted class with "
        "its probability, true class. Saliency should lie on what defines the class, not on borders, markings or "
        "background."
    ),
    "saliency_wrong": (
        "{shown} of {total} misclassified images ({data}), the most confident ones. Left: the image; right: overlaid "
        "with the saliency of the predicted class, scaled to the maximum of each image, so that colours cannot be "
        "compared between images. Above and below each: file; predicted class with its probability, true class. Look "
        "for wrong labels and for structures that mislead the classifier."
    ),
}
