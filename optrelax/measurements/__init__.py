"""The three properties of a relaxation that shape certified training, and the landscape of its loss.

Tightness on a fixed network, continuity in the weights, sensitivity to them: Jovanovic et al. 2021, arXiv 2102.06700.
Every tool takes any relaxation, those that users register too. It may import everything; nothing imports it but the
command line.
"""
