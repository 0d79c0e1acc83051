"""Curvature of the negative log likelihood in weight space: G = scale * sum_n J_n' Lambda_n J_n."""
