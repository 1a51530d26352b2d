"""The paper in three files: objective, teacher, learning-rate schedule."""
