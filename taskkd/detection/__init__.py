"""Object detection: detectors of torchvision and transformers, any other through tap names."""
