"""A walk that begins at the localizer: no fit, no pass over the data.

Where the localizer decides most directions, the posterior is nearly round in the coordinates
`sqrt(gamma + nbeta curvature)`, one number for each array of parameters. A few gradient differences
on small batches measure this curvature, the *stiffness* (the largest eigenvalue of the Hessian of
nbeta L_n in these coordinates) and the noise of a gradient. They choose the coordinates, the step
and the batch. Then walkers step on fresh minibatches, and what the noise adds to llc, its *heat*,
is bounded by a batch large enough, and half of it taken off.
"""
