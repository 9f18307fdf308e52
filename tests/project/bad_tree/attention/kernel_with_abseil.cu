#include "pristine/buffers/cuda_in_public.h"
