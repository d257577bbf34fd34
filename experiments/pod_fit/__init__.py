"""Do the models that people train fit the pods that people have, and what limits them there?"""
