#include "buffers/arena.h"
