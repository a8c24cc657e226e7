"""Networks: captured from modules and files, as graphs of affine ops and activations."""
