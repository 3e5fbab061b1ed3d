"""What people look at: pages of an evaluation and of a training run, and the terminal's table.

Names are looked up when they are used: matplotlib and torch take their time to load.
"""
