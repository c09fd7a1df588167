"""The toy runs of `toy_world`, for every test here."""

import toy_world

toy, toy_fit = toy_world.toy, toy_world.toy_fit
