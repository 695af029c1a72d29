"""Captions of the figures of anomalies, as templates by file name; see `report.captioned`.

"Abnormal" and "lesion" refer to the ground truth, "anomalous" and "finding" to the output of the model.
"""

_MAPS = (
    " From left to right: image, detail (white frame), score map, detail of the score map. Yellow outlines: findings, "
    "that is regions above the pixel threshold (▼ on the colour bar). {truth}Grey: not scored."
)
_TRUTH = "Cyan outlines: lesions of the ground truth. "

CAPTIONS = {
    "calibration": (
        "Image scores of {images} normal validation images in {groups} groups, which were not used for training: one "
        "dot per image, or a histogram if there are many. Dashed line: image threshold, set on these images; grey "
        "band: its 95 % bootstrap interval over groups. A wide band or isolated high scores mean that more normal "
        "images are needed."
    ),
    "validation_score_maps": (
        "{shown} of {images} normal validation images, evenly spaced in the list of files."
        + _MAPS.format(truth="")
        + " Scores should be low and without structure, because these images are normal; look for anatomy that scores "
        "high in all images."
    ),
    "planted": (
        "{shown} normal validation images with a planted anomaly, one of each kind: constant added or subtracted, "
        "noise added, patch of another image pasted, pixels displaced."
        + _MAPS.format(truth="Cyan outlines: planted anomalies. ")
        + " Scores should be high inside the cyan outlines."
    ),
    "validation_reconstructions": (
        "{shown} of {images} normal validation images, evenly spaced in the list of files: the image, its "
        "reconstruction by the model, and their difference (red: the image is brighter; blue: darker; grey: not "
        "scored). Look for normal structures that the model does not reproduce."
    ),
    "distances": (
        "{windows:,} windows of {images} normal validation images, which were not used for training. Left: quantiles "
        "of their squared Mahalanobis distances against those of the chi-squared distribution, each divided by the "
        "number of dimensions. Right: observed against nominal false-alarm rate of the p-values of each theoretical "
        "distribution. Dashed: perfect agreement. Departures from the diagonals show where the Gaussian model does not "
        "hold."
    ),
    "roc_pr_images": (
        "ROC (left) and precision-recall curves (right) of the image scores of the test images: {abnormal} abnormal "
        "and {normal} normal. Thick: the method; thin: baselines that need no training; dotted: chance; dot: the "
        "calibrated image threshold. Where a thin curve lies above the thick one, the baseline is the better score."
    ),
    "roc_pr_pixels": (
        "ROC (left) and precision-recall curves (right) of the scores of all foreground pixels of the test images "
        "({abnormal} abnormal, {normal} normal images); positive are the pixels of lesions. Thick: the method; thin: "
        "baselines that need no training; dotted: chance; dot: the calibrated pixel threshold. Lesions are a small "
        "fraction of the pixels, so that the precision-recall panel is the more informative one."
    ),
    "scores_images": (
        "Image scores of the {abnormal} abnormal and {normal} normal test images by true class: one dot per image, or "
        "histograms if there are many. Dashed line: image threshold; grey band: its 95 % interval. Images to the right "
        "of the line are called anomalous. Where the classes overlap, no threshold separates them."
    ),
    "scores_pixels": (
        "Histograms of the scores of normal pixels and of lesion pixels (ground truth) in the test images ({abnormal} "
        "abnormal, {normal} normal images), each normalised to 1. Dashed line: pixel threshold; grey band: its 95 % "
        "interval. Normal pixels to the right of the line are false alarms, lesion pixels to its left are missed."
    ),
    "false_alarms_pixels": (
        "Observed against nominal false-alarm rate of the normal pixels of the test images ({abnormal} abnormal, "
        "{normal} normal images). Line with dots: observed; band: 95 % bootstrap interval over groups; dashed: perfect "
        "calibration. Above the diagonal there are more false alarms than configured: the test images vary more than "
        "the validation images."
    ),
    "score_maps_hits": (
        "{shown} of {abnormal} abnormal test images, those with the highest image scores."
        + _MAPS.format(truth=_TRUTH)
        + " Look at whether the highest scores lie on the lesions."
    ),
    "score_maps_misses": (
        "{shown} of {abnormal} abnormal test images, those with the lowest image scores."
        + _MAPS.format(truth=_TRUTH)
        + " Look at which kinds of lesions are missed."
    ),
    "score_maps_false_alarms": (
        "{shown} of {normal} normal test images, those with the highest image scores."
        + _MAPS.format(truth="")
        + " Look at which normal structures raise the score."
    ),
    "reconstructions": (
        "{shown} test images (of {abnormal} abnormal and {normal} normal): the image, its reconstruction by the model, "
        "and their difference (red: the image is brighter; blue: darker; grey: not scored). The difference should be "
        "large on lesions and small elsewhere."
    ),
    "samples": (
        "{shown} of {images} drawn images, each above its nearest training patch; the last rows show as many patches "
        "of normal validation images. Black to white: {scale}. Drawn images should look like the real patches; one "
        "that equals its nearest training patch is a copy."
    ),
    "samples_alone": (
        "{shown} of {images} drawn images. Black to white: {scale}. There are no real patches beside them, because the "
        "images of the run cannot be read any more. Look for structures that no patch of your images has, and for "
        "images that are all alike."
    ),
}
