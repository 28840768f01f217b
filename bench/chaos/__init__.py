"""Does the scheduler keep its promises? Real processes under load beyond what they carry, killed and frozen."""
