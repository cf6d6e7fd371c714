// Binds engine/outcome.h: what callers ask of a request, and wait for.
#include "engine/outcome.h"

#include <algorithm>
#include <optional>

#include "bind.h"
#include "clock.h"

namespace hetkv {
using namespace engine;
namespace {

// Longest sleep between two looks for signals, Ctrl-C above all.
constexpr std::uint64_t kSignalsNs = 50'000'000;

// Calls `wait(deadline_ns, slept)` without the interpreter's lock until it says true or the time is over.
template <typename Wait>
bool wait_for(const std::optional<double>& timeout, Wait wait) {
  constexpr double kLongest = 1e9;  // seconds
  const std::uint64_t now = system_clock()->now_ns();
  const double seconds = std::clamp(timeout.value_or(kLongest), 0.0, kLongest);
  const std::uint64_t deadline = now + static_cast<std::uint64_t>(seconds * 1e9);
  for (std::uint64_t until = now;;) {
    const bool slept = until != now;
    until = std::min(deadline, system_clock()->now_ns() + kSignalsNs);
    bool found = false;
    {
      const py::gil_scoped_release release;
      found = wait(until, slept);
    }
    if (found || until == deadline) return found;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
}

}  // namespace

void bind_outcome(py::module_& m) {
  py::class_<Outcome, std::shared_ptr<Outcome>>(m, "Outcome")
      .def_readonly("handle", &Outcome::handle)
      .def_property_readonly("phase", [](const Outcome& self) { return static_cast<int>(self.phase()); })
      .def_property_readonly("ended", &Outcome::ended)
      .def_property_readonly(
          "failure",
          [](const Outcome& self) -> std::optional<std::pair<int, std::string>> {
            if (self.phase() != Phase::kFailed) return std::nullopt;
            return std::make_pair(static_cast<int>(self.failure().code), self.failure().detail);
          },
          "Code and text of the failure; None where it has not failed.")
      .def("arrived", &Outcome::arrived, py::arg("layer"))
      .def("watch", &Outcome::watch, py::arg("what"))
      .def(
          "wait",
          [](const Outcome& self, int phase, const std::optional<double>& timeout) {
            const auto least = static_cast<Phase>(phase);
            if (self.phase() >= least) return true;
            return wait_for(timeout, [&](std::uint64_t until, bool slept) { return self.wait(least, until, slept); });
          },
          py::arg("phase"), py::arg("timeout") = py::none(),
          "Until the request is in this phase or a later one; False after `timeout` seconds.")
      .def(
          "wait_layer",
          [](const Outcome& self, std::size_t layer, const std::optional<double>& timeout) {
            if (self.arrived(layer)) return true;
            return wait_for(timeout,
                            [&](std::uint64_t until, bool slept) { return self.wait_layer(layer, until, slept); });
          },
          py::arg("layer"), py::arg("timeout") = py::none(), "Until the layer has arrived or the request has ended.");
}

}  // namespace hetkv
