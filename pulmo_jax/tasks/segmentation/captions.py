"""Captions of the figures of a segmentation, as templates by file name; see `report.captioned`."""

_CONTOURS = (
    " From left to right: the image; the image with the contours of truth and prediction; the part in the white frame, "
    "where they differ most. Solid: ground truth; dashed: prediction, in the colour of its class (a single class: "
    "cyan and yellow). Dark: unlabelled, not scored. Above each: file and Dice of each class. "
)

CAPTIONS = {
    "comparison": (
        "Mean Dice of each class on {images} images in {groups} groups ({data}). Dots: estimates; lines: 95 % "
        "bootstrap intervals over groups. Blue: the run; grey: trivial baselines ({methods} rows in all). Where a "
        "baseline lies within the interval of the run, the run is hardly better than the baseline on these images."
    ),
    "worst": (
        "{shown} of {images} images ({data}): those with the lowest mean Dice over the classes, at first one of each "
        "group." + _CONTOURS + "Look for structures that are missed in several images, and for doubtful labels."
    ),
    "median": (
        "{shown} of {images} images ({data}): those whose mean Dice is nearest to the median."
        + _CONTOURS
        + "This is the quality to be expected of a typical image."
    ),
    "best": (
        "{shown} of {images} images ({data}): those with the highest mean Dice, at first one of each group."
        + _CONTOURS
        + "Where even these contours differ, the difference is near the precision of the labels."
    ),
    "dice_by_size": (
        "Dice of each of {images} images ({data}) against the true area of the class; dashed: the mean. Images with "
        "neither true nor predicted pixels of a class have no Dice; those with predicted pixels only have a Dice of 0 "
        "and are counted in the title. Look for a Dice that falls with the area: small regions have a long boundary "
        "for their area."
    ),
    "free_response": (
        "Free-response curves on {images} images ({data}): fraction of the true components that a predicted component "
        "overlaps, against the number of false components per image, as the threshold of the component's highest "
        "probability varies. Dots: at the threshold of the run. Components under {min_area_px} px are not counted. "
        "Curves further to the upper left are better."
    ),
    "reliability": (
        "Above: fraction of the pixels in the class against their predicted probability, in bins of equal width, on "
        "{images} images in {groups} groups ({data}), each with the same total weight; band: 95 % bootstrap interval "
        "over groups; dashed: perfect calibration. Below: number of pixels in each bin. Points below the diagonal: the "
        "probabilities are too high. Most pixels are certain, so that the expected calibration error (ECE) is small "
        "even if the bins between are off."
    ),
    "dice_by_threshold": (
        "Mean Dice of each class against the threshold of its probability, on {images} images in {groups} groups "
        "({data}), each class against all else; band: 95 % bootstrap interval over groups. Dashed line: threshold of "
        "the run, chosen on the validation images; grey: its 95 % interval, or of several folds its range. A flat "
        "curve means that the choice of the threshold matters little; a maximum far from the dashed line means that "
        "these images differ from the validation images."
    ),
}
