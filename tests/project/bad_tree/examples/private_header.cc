#include "graph_runtime/host/host_stream.h"
