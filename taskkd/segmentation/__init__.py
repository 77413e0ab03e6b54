"""Semantic segmentation: torchvision, transformers, segmentation-models-pytorch; any network through tap names."""
