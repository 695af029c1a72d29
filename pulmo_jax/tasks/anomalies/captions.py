"""Captions of the figures of anomalies, as templates by file name; see `report.captioned`."""

CAPTIONS = {
    "calibration": (
        "Image scores of {images} normal validation images, and the image threshold with its 95 % interval over "
        "{groups} groups. A wide interval or isolated high scores mean that more normal images are needed."
    ),
    "validation_score_maps": (
        "{shown} of {images} normal validation images, evenly spaced, with score maps, whole and in detail. Scores "
        "should be low and without structure; look for anatomy that scores high in all images."
    ),
    "validation_reconstructions": (
        "{shown} of {images} normal validation images with their reconstruction and the difference. Look for normal "
        "structures that the model does not reproduce."
    ),
    "distances": (
        "Left: squared Mahalanobis distances of {windows:,} held-out windows of {images} normal images against "
        "chi-squared quantiles. Right: observed against nominal false-alarm rate of theoretical p-values. Departures"
        " from the diagonals show where the Gaussian model does not hold."
    ),
    "roc_pr_images": (
        "ROC and precision-recall curves of the image scores ({abnormal} abnormal, {normal} normal images). The "
        "method (thick) should lie above its baselines (thin) and chance (dotted); the dot is the calibrated "
        "threshold."
    ),
    "roc_pr_pixels": (
        "ROC and precision-recall curves of the pixel scores ({abnormal} abnormal, {normal} normal images). Findings"
        " are a small fraction of the pixels, so the precision-recall panel is the more informative one; the dot is "
        "the calibrated threshold."
    ),
    "scores_images": (
        "Image scores of {abnormal} abnormal and {normal} normal images, and the calibrated threshold. Where the "
        "histograms overlap, no threshold separates the classes."
    ),
    "scores_pixels": (
        "Scores of normal and abnormal pixels ({abnormal} abnormal, {normal} normal images), and the calibrated "
        "threshold. Normal pixels above the threshold are false alarms."
    ),
    "false_alarms_pixels": (
        "Observed against nominal false-alarm rate of the normal pixels of the test images ({abnormal} abnormal, "
        "{normal} normal images). Above the diagonal there are more false alarms than configured: the test images "
        "vary more than the validation images."
    ),
    "score_maps_hits": (
        "{shown} of {abnormal} abnormal images, those with the highest image scores, with contours of ground truth "
        "and detections. Look at whether the highest scores lie on the findings."
    ),
    "score_maps_misses": (
        "{shown} of {abnormal} abnormal images, those with the lowest image scores, with contours of ground truth "
        "and detections. Look at which kinds of findings are missed."
    ),
    "score_maps_false_alarms": (
        "{shown} of {normal} normal images, those with the highest image scores. Look at which normal structures "
        "raise the score."
    ),
    "reconstructions": (
        "{shown} test images (of {abnormal} abnormal and {normal} normal) with their reconstruction and the difference."
        " The difference should be large on findings and small elsewhere."
    ),
}
