"""Recipe, samples, student, teacher and the loop that lets one learn from the other."""
