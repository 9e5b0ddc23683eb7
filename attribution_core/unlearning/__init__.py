"""Unlearning that acts: new weights of a checkpoint as if some training examples had never been there, judged against retrainings."""
