"""Training: recipes, data, and the two runs that make an expert (`expert.py`) and a head (`head.py`)."""
