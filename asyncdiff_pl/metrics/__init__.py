"""What a picture is worth: scores as plain maths over tensors and pictures."""
