"""seqio registrations: the XTREME-UP release and the embedded benchmark."""
