// replay_driver --help says what this does.
#include <unistd.h>

#include <iostream>
#include <string>
#include <vector>

#include "examples/replay_driver/driver.h"

int main(int argc, char** argv) {
  const std::vector<std::string> args(argv + (argc > 0 ? 1 : 0), argv + argc);
  const pristine::replay_driver::Environment environment = {
      .out = std::cout, .err = std::cerr, .terminal = isatty(STDERR_FILENO) == 1};
  return static_cast<int>(pristine::replay_driver::RunDriver(args, environment));
}
