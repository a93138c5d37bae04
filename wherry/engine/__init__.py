"""What walks over a model: stream (tensor by tensor, no data) and walk (block by block, calibrated)."""
