"""
What is shown in training.

images.py    from a file to what CLIP expects          llava.py    LLaVA's JSON, checked record by record
world.py     the drawn world: what there is, what is asked, samples; drawing.py draws it
batches.py   a sample, the order in which samples come, and a batch of them
sources.py   what a run reads: a new dataset goes in here
export.py    the drawn world as PNGs with LLaVA's JSON      check.py    what a run would meet in such a folder
"""
