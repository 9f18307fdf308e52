#include "pristine/buffers/buffer_manager.h"
