"""Transfer syntaxes whose pixels lie in the file as integers; all others are decoded.

References
----------
DICOM PS3.5, A.1, A.2, A.3 and A.5.
"""

IMPLICIT_VR = "1.2.840.10008.1.2"
EXPLICIT_VR = "1.2.840.10008.1.2.1"
BIG_ENDIAN = "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"

PLAIN = (IMPLICIT_VR, EXPLICIT_VR, BIG_ENDIAN)
"""The integers are where the element is."""
NATIVE = (*PLAIN, DEFLATED)
"""… once what follows the meta group is unpacked."""

UNDEFINED_LENGTH = 0xFFFF_FFFF
"""Length of an element that is a sequence of fragments: encoded pixels."""
