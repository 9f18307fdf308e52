#include "buffers/staging_ring.h"
