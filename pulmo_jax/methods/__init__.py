"""Methods of anomaly detection, image classification and landmark detection."""
