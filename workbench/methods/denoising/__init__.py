"""Samplers that turn noise into data by repeated denoising."""
