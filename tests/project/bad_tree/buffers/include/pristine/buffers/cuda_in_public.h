#include <cuda_runtime.h>

#include "absl/status/status.h"
