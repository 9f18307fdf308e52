#include "pristine/graph_runtime/graph_runner.h"
