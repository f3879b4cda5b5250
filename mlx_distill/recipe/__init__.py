"""A recipe: what it can say (`tables`), when a field is read (`read_when`), what makes no sense
together (`contradictions`), how a file becomes one (`load`), and the page that shows every field
(`reference`).
"""
