"""Loss terms: what of student, teacher and factors a term names -> scalar."""
