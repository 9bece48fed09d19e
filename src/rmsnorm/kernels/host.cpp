// Norms that Python has planned before, run again without it; see host.py.
//
//   norm    ->  Key of the arguments  ->  Plan  ->  fresh tensors, launches  ->  y, or (y, s)
//               no plan, or anything but plain tensors: None, and Python's turn
//   Norm    ->  the same for the gradients, where autograd asks for them
//   learn   <-  Python, which has run what it plans

#include <Python.h>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/record_function.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

namespace py = pybind11;
using at::Tensor;
using c10::DispatchKey;
using c10::DispatchKeySet;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Word = uint64_t; // an address, or a number in its first bytes
using Tensors = c10::SmallVector<Tensor, 9>;

constexpr size_t MOST_PLANS = 4096, MOST_ARGUMENTS = 48, LARGEST_CONFIGURATION = 64;

// --- what is planned -------------------------------------------------------------------------------------------

// The rows are the tensor that is normalized: what a fresh tensor is as large as, or so many numbers.
enum Size : int64_t { LIKE_ROWS = -1, A_NUMBER_A_ROW = -2, LIKE_WEIGHT = -3, ONES_LIKE_WEIGHT = -4 };

struct Fresh {
  at::ScalarType dtype;
  int64_t size;

  Tensor of(const Tensor& rows) const {
    const auto options = rows.options().dtype(dtype);
    switch (size) {
      case LIKE_ROWS: return at::empty(rows.sizes(), options);
      case A_NUMBER_A_ROW: return at::empty(rows.sizes().slice(0, rows.dim() - 1), options);
      case LIKE_WEIGHT: return at::empty({rows.size(-1)}, options);
      case ONES_LIKE_WEIGHT: return at::ones({rows.size(-1)}, options);
      default: return at::empty({size}, options);
    }
  }
};

using CuLaunchKernelEx = int (*)(const void* configuration, void* function, void** arguments, void** extra);

template <size_t... i>
void call(Word function, const Word* given, std::index_sequence<i...>) {
  reinterpret_cast<void (*)(decltype(Word(i))...)>(function)(given[i]...);
}

// Whether there is a way to call machine code with so many arguments, and the call.
bool call(Word function, const Word* given, size_t count) {
  switch (count) {
    case 4: call(function, given, std::make_index_sequence<4>()); return true;
    case 10: call(function, given, std::make_index_sequence<10>()); return true;
    case 11: call(function, given, std::make_index_sequence<11>()); return true;
    default: return false;
  }
}

struct Launch {
  Word function;
  std::vector<Word> words; // the arguments
  std::vector<int> places; // for each whose address it is, by the order of the tensors; -1: nobody's
  Word launcher; // cuLaunchKernelEx, or 0 where the function is machine code of the CPU
  std::string configuration; // CUlaunchConfig
  size_t stream_at; // in the configuration

  bool run(const Word* addresses, void* stream) const {
    Word given[MOST_ARGUMENTS];
    void* pointers[MOST_ARGUMENTS];
    for (size_t i = 0; i < words.size(); i++) {
      given[i] = places[i] < 0 ? words[i] : addresses[places[i]];
      pointers[i] = given + i;
    }
    if (launcher == 0) {
      return call(function, given, words.size());
    }
    alignas(8) char whole[LARGEST_CONFIGURATION];
    std::memcpy(whole, configuration.data(), configuration.size());
    std::memcpy(whole + stream_at, &stream, sizeof stream);
    const auto launch = reinterpret_cast<CuLaunchKernelEx>(launcher);
    return launch(whole, reinterpret_cast<void*>(function), pointers, nullptr) == 0;
  }
};

// Whether the storage holds all that the shape says: others may have freed it, or swapped it for a smaller one.
bool in_memory(const Tensor& t) {
  if (!t.defined() || t.numel() == 0) {
    return true;
  }
  int64_t elements = t.numel();
  if (!t.is_contiguous()) {
    elements = 1;
    for (int64_t i = 0; i < t.dim(); i++) {
      elements += (t.size(i) - 1) * t.stride(i);
    }
  }
  const auto needed = static_cast<size_t>(t.storage_offset() + elements) * t.element_size();
  return t.storage().nbytes() >= needed;
}

struct Plan {
  std::vector<std::optional<Fresh>> fresh;
  std::vector<Launch> launches;
  Word aligned; // bits that no address may have
  std::shared_ptr<PyObject> keeps; // the compiled code, and what its arguments point to

  // What the key cannot tell: whether these inputs are in memory, aligned, and on the current device. If they are not,
  // Python makes the call, or says what is wrong.
  bool fits(const Tensors& inputs, const Tensor& rows) const {
    Word bits = 0;
    for (const auto& t : inputs) {
      if (!in_memory(t)) {
        return false;
      }
      bits |= t.defined() ? reinterpret_cast<Word>(t.const_data_ptr()) : 0;
    }
    return (bits & aligned) == 0 &&
        (!rows.is_cuda() || c10::impl::getDeviceGuardImpl(c10::DeviceType::CUDA)->getDevice() == rows.device());
  }

  // Appends the fresh tensors to the inputs. False if nothing could be launched, or not all of it.
  bool run(Tensors& tensors, const Tensor& rows) const {
    if (!fits(tensors, rows)) {
      return false;
    }
    void* stream = nullptr;
    if (rows.is_cuda()) {
      stream = c10::impl::getDeviceGuardImpl(c10::DeviceType::CUDA)->getStream(rows.device()).native_handle();
    }
    for (const auto& one : fresh) {
      tensors.push_back(one ? one->of(rows) : Tensor());
    }
    c10::SmallVector<Word, 9> addresses;
    Word bits = 0;
    for (const auto& t : tensors) {
      addresses.push_back(t.defined() ? reinterpret_cast<Word>(t.const_data_ptr()) : 0);
      bits |= addresses.back();
    }
    if (bits & aligned) {
      return false;
    }
    for (const auto& launch : launches) {
      if (!launch.run(addresses.data(), stream)) {
        return false;
      }
    }
    return true;
  }
};

// --- by what it is found ---------------------------------------------------------------------------------------

// All that a plan depends on: of each tensor dtype, device, shape and strides, and the numbers of the spec.
struct Key {
  c10::SmallVector<int64_t, 48> numbers;

  void add(const Tensor& t) {
    if (!t.defined()) {
      numbers.push_back(-1);
      return;
    }
    const auto device = t.device();
    numbers.push_back(
        static_cast<int64_t>(t.scalar_type()) | t.dim() << 8 | static_cast<int64_t>(device.type()) << 16 |
        static_cast<int64_t>(device.index() + 1) << 24);
    numbers.append(t.sizes().begin(), t.sizes().end());
    numbers.append(t.strides().begin(), t.strides().end());
  }

  bool operator==(const Key& other) const {
    return numbers == other.numbers;
  }
};

struct Hash {
  size_t operator()(const Key& key) const {
    size_t hash = 0;
    for (const auto number : key.numbers) {
      hash = (hash ^ static_cast<size_t>(number)) * 0x9E3779B97F4A7C15;
      hash ^= hash >> 32;
    }
    return hash;
  }
};

struct Spec {
  bool early, offset; // the offset is 0 or 1
};

Key forward_key(const Tensors& inputs, double eps, Spec spec, bool with_rstd) {
  Key key;
  int64_t bits;
  std::memcpy(&bits, &eps, sizeof bits);
  key.numbers = {bits, spec.early | spec.offset << 1 | with_rstd << 2};
  for (const auto& t : inputs) {
    key.add(t);
  }
  return key;
}

// rstd, the last of the inputs, is always the same beside the others.
Key backward_key(const Tensors& inputs, Spec spec, bool need_dx, bool need_dw) {
  Key key;
  key.numbers = {-1, spec.early | spec.offset << 1 | need_dx << 2 | need_dw << 3};
  for (size_t i = 0; i + 1 < inputs.size(); i++) {
    key.add(inputs[i]);
  }
  return key;
}

using Plans = std::unordered_map<Key, std::shared_ptr<const Plan>, Hash>;
Plans& plans = *new Plans; // never destroyed: Python may have ended before
std::mutex& plans_mutex = *new std::mutex;

// Whether this thread's last look found nothing, so that Python's next call is one to learn.
thread_local bool missed = false;

// Nobody waits for the lock: where another thread has it, or had it when this process was forked, Python takes the call.
using Lock = std::unique_lock<std::mutex>;

std::shared_ptr<const Plan> planned(const Key& key) {
  const Lock lock(plans_mutex, std::try_to_lock);
  if (!lock) {
    return nullptr;
  }
  const auto found = plans.find(key);
  missed = found == plans.end();
  return missed ? nullptr : found->second;
}

// Whether all are real memory and nobody watches: no subclass, transform, mode, trace, tangent, or pending minus sign.
bool plain(const Tensors& tensors) {
  static const DispatchKeySet known =
      DispatchKeySet({DispatchKey::CPU, DispatchKey::CUDA, DispatchKey::AutogradCPU, DispatchKey::AutogradCUDA,
                      DispatchKey::ADInplaceOrView, DispatchKey::BackendSelect}) |
      c10::autocast_dispatch_keyset;
  auto keys = c10::impl::tls_local_dispatch_key_set().included_;
  for (const auto& t : tensors) {
    if (t.defined()) {
      keys = keys | t.key_set();
      if (t._fw_grad(0).defined()) {
        return false;
      }
    }
  }
  return (keys.raw_repr() & ~known.raw_repr()) == 0;
}

// --- autograd --------------------------------------------------------------------------------------------------

PyObject* slow_backward = nullptr; // ops.py's, for what is not planned

struct Dtypes {
  at::ScalarType rows, w; // as they were saved; w: anything without a weight
};

PyObject* wrap(const Tensor& t) {
  return t.defined() ? THPVariable_Wrap(t) : Py_NewRef(Py_None);
}

Tensor unwrap(py::handle object) {
  return object.is_none() ? Tensor() : THPVariable_Unpack(object.ptr());
}

std::pair<Tensor, Tensor> in_python(
    const Tensors& inputs, Spec spec, bool need_dx, bool need_dw, const Dtypes& saved) {
  const py::gil_scoped_acquire gil;
  py::tuple arguments(11);
  for (size_t i = 0; i < inputs.size(); i++) {
    arguments[i] = py::reinterpret_steal<py::object>(wrap(inputs[i]));
  }
  arguments[5] = py::str(spec.early ? "early" : "late");
  arguments[6] = py::float_(spec.offset ? 1.0 : 0.0);
  arguments[7] = py::bool_(need_dx);
  arguments[8] = py::bool_(need_dw);
  arguments[9] = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(torch::getTHPDtype(saved.rows)));
  arguments[10] = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(torch::getTHPDtype(saved.w)));
  const auto found = py::reinterpret_steal<py::object>(PyObject_CallObject(slow_backward, arguments.ptr()));
  if (!found) {
    python_error error;
    error.persist();
    throw error;
  }
  const py::tuple gradients(found);
  return {unwrap(gradients[0]), unwrap(gradients[1])};
}

// dx and dw; inputs: dy, ds, rows, w, rstd.
std::pair<Tensor, Tensor> gradients(
    const Tensors& inputs, Spec spec, bool need_dx, bool need_dw, const Dtypes& saved) {
  missed = false;
  const auto &rows = inputs[2], &w = inputs[3], &rstd = inputs[4];
  // In grad mode the gradient must stay tied to its inputs, to raise if it is differentiated.
  const bool ours = !at::GradMode::is_enabled() && plain(inputs) && rstd.is_contiguous() &&
      rstd.scalar_type() == at::kFloat && rstd.device() == rows.device() &&
      rows.dim() > 0 && rstd.sizes() == rows.sizes().slice(0, rows.dim() - 1) && rows.scalar_type() == saved.rows &&
      (!w.defined() || w.scalar_type() == saved.w);
  if (ours) {
    const auto plan = planned(backward_key(inputs, spec, need_dx, need_dw));
    Tensors tensors(inputs);
    if (plan && plan->run(tensors, rows)) {
      return {tensors[5], tensors[6]};
    }
  }
  return in_python(inputs, spec, need_dx, need_dw, saved);
}

} // namespace

namespace rmsnorm {

// As ops._saved: torch's error about a tensor that was modified, with the way out.
variable_list saved_variables(AutogradContext* ctx) {
  try {
    return ctx->get_saved_variables();
  } catch (const c10::Error& error) {
    const std::string said = error.what_without_backtrace();
    TORCH_CHECK(
        said.find("modified by an inplace operation") == std::string::npos,
        "[rms_norm] x or weight was modified in place after the forward pass, which keeps them for the backward pass: "
        "write x = x + ... instead of x += ..., or rmsnorm.unpatch the norm (", said, ")");
    throw;
  }
}

// As ops._Norm: saves what was normalized, the weight, and a number a row.
struct Norm : torch::autograd::Function<Norm> {
  static constexpr bool is_traceable = true; // the backward pass knows nothing but what is saved here

  static variable_list forward(
      AutogradContext* ctx, const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& w,
      const Tensors* tensors, Spec spec) {
    const auto &y = (*tensors)[3], &s = (*tensors)[4], &rstd = (*tensors)[5];
    const auto& rows = residual ? s : x;
    ctx->save_for_backward({rows, w ? *w : Tensor(), rstd});
    ctx->set_materialize_grads(false);
    const auto dtype = [](const Tensor& t) { return static_cast<int64_t>(t.scalar_type()); };
    ctx->saved_data["how"] = spec.early | spec.offset << 1 | static_cast<int64_t>(residual.has_value()) << 2 |
        dtype(x) << 8 | dtype(residual ? *residual : x) << 16 | dtype(rows) << 24 | dtype(w ? *w : rows) << 32;
    return residual ? variable_list{y, s} : variable_list{y};
  }

  static variable_list backward(AutogradContext* ctx, variable_list given) {
    const auto saved = saved_variables(ctx);
    const auto how = ctx->saved_data["how"].toInt();
    const Spec spec{(how & 1) != 0, (how & 2) != 0};
    const bool adds = (how & 4) != 0;
    const auto dtype = [how](int bit) { return static_cast<at::ScalarType>(how >> bit & 0xFF); };
    const bool need_x = ctx->needs_input_grad(0), need_residual = adds && ctx->needs_input_grad(1);
    const bool need_dw = saved[1].defined() && ctx->needs_input_grad(adds ? 2 : 1);
    const auto ds = adds ? given[1] : Tensor();
    Tensor d_rows, dw;
    if (given[0].defined()) {
      std::tie(d_rows, dw) = gradients(
          {given[0], ds, saved[0], saved[1], saved[2]}, spec, need_x || need_residual, need_dw, {dtype(24), dtype(32)});
    } else {
      d_rows = ds;
    }
    const auto as = [&](at::ScalarType dtype) { return d_rows.defined() ? d_rows.to(dtype) : d_rows; };
    return {
        need_x ? as(dtype(8)) : Tensor(), need_residual ? as(dtype(16)) : Tensor(), need_dw ? dw : Tensor(), Tensor(),
        Tensor()};
  }
};

} // namespace rmsnorm

namespace {

// --- what Python calls -----------------------------------------------------------------------------------------

bool taken(PyObject* object, Tensors& tensors, bool optional) {
  if (optional && object == Py_None) {
    tensors.push_back(Tensor());
    return true;
  }
  if (!THPVariable_CheckExact(object)) {
    return false;
  }
  tensors.push_back(THPVariable_Unpack(object));
  return true;
}

// The spec, if it is one that needs no check; Python judges the others.
std::optional<Spec> known_spec(PyObject* cast, PyObject* offset) {
  if (!PyUnicode_CheckExact(cast) || !PyFloat_CheckExact(offset)) {
    return std::nullopt;
  }
  const bool early = PyUnicode_CompareWithASCIIString(cast, "early") == 0;
  const double added = PyFloat_AS_DOUBLE(offset);
  if ((!early && PyUnicode_CompareWithASCIIString(cast, "late") != 0) || (added != 0.0 && added != 1.0)) {
    return std::nullopt;
  }
  return Spec{early, added == 1.0};
}

struct Call {
  Tensors tensors;
  std::optional<Spec> spec;
  bool differentiable = false;
  std::shared_ptr<const Plan> plan; // or none
};

// The call of norm(x, residual, w, eps, cast, offset).
Call call_of(PyObject* const* given, Py_ssize_t count) {
  missed = false;
  Call call;
  if (count != 6 || !taken(given[0], call.tensors, false) || !taken(given[1], call.tensors, true) ||
      !taken(given[2], call.tensors, true) || !PyFloat_CheckExact(given[3])) {
    return call;
  }
  call.spec = known_spec(given[4], given[5]);
  if (!call.spec || !plain(call.tensors)) {
    return call;
  }
  bool inference = false;
  if (at::GradMode::is_enabled()) {
    for (const auto& t : call.tensors) {
      call.differentiable = call.differentiable || (t.defined() && t.requires_grad());
      inference = inference || (t.defined() && t.is_inference());
    }
  }
  if (call.differentiable && inference) {
    return call; // autograd cannot save such a tensor
  }
  call.plan = planned(forward_key(call.tensors, PyFloat_AS_DOUBLE(given[3]), *call.spec, call.differentiable));
  return call;
}

// replays(x, residual, w, eps, cast, offset): whether `norm` would make this call.
PyObject* replays(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const auto call = call_of(given, count);
  missed = false;
  return PyBool_FromLong(call.plan != nullptr && call.plan->fits(call.tensors, call.tensors[0]));
  END_HANDLE_TH_ERRORS
}

// norm(x, residual, w, eps, cast, offset): y, or (y, s) with a residual; None if it is not planned.
PyObject* norm(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  auto call = call_of(given, count);
  auto& tensors = call.tensors;
  const auto& plan = call.plan;
  const auto& spec = call.spec;
  const bool differentiable = call.differentiable;
  if (!plan) {
    Py_RETURN_NONE;
  }
  RECORD_FUNCTION("rmsnorm", c10::ArrayRef<const c10::IValue>{});
  const auto x = tensors[0];
  bool ran;
  if (x.is_cuda()) {
    const py::gil_scoped_release released; // what a GPU waits for may need the GIL
    ran = plan->run(tensors, x);
  } else {
    ran = plan->run(tensors, x);
  }
  if (!ran) {
    Py_RETURN_NONE;
  }
  const bool adds = tensors[1].defined();
  variable_list outputs;
  if (differentiable) {
    const auto given_or_not = [](const Tensor& t) { return t.defined() ? std::optional<Tensor>(t) : std::nullopt; };
    const Tensors* all = &tensors;
    outputs = rmsnorm::Norm::apply(x, given_or_not(tensors[1]), given_or_not(tensors[2]), all, *spec);
  } else {
    outputs = {tensors[3], tensors[4]};
  }
  if (!adds) {
    return THPVariable_Wrap(outputs[0]);
  }
  return PyTuple_Pack(2, py::reinterpret_steal<py::object>(THPVariable_Wrap(outputs[0])).ptr(),
                      py::reinterpret_steal<py::object>(THPVariable_Wrap(outputs[1])).ptr());
  END_HANDLE_TH_ERRORS
}

at::ScalarType dtype_of(py::handle object) {
  TORCH_CHECK_TYPE(THPDtype_Check(object.ptr()), "a fresh tensor has no dtype");
  return reinterpret_cast<THPDtype*>(object.ptr())->scalar_type;
}

Tensors all_of(const py::tuple& given) {
  Tensors tensors;
  for (const auto& one : given) {
    tensors.push_back(unwrap(one));
  }
  return tensors;
}

// inputs: how many. outputs: how many of what is fresh come out. fresh: None, or (dtype, size). launches: (function,
// words, places, launcher, configuration, stream_at).
void learn(
    Key key, size_t inputs, size_t outputs, const py::tuple& fresh, const py::tuple& launches, Word aligned,
    const py::object& keeps) {
  TORCH_CHECK_VALUE(fresh.size() >= outputs, "fewer fresh tensors than come out");
  auto plan = std::make_shared<Plan>();
  for (const auto& one : fresh) {
    if (one.is_none()) {
      plan->fresh.push_back(std::nullopt);
    } else {
      const auto pair = py::cast<py::tuple>(one);
      plan->fresh.push_back(Fresh{dtype_of(pair[0]), py::cast<int64_t>(pair[1])});
    }
  }
  for (const auto& one : launches) {
    const auto parts = py::cast<py::tuple>(one);
    const Launch launch{
        py::cast<Word>(parts[0]), py::cast<std::vector<Word>>(parts[1]), py::cast<std::vector<int>>(parts[2]),
        py::cast<Word>(parts[3]), py::cast<py::bytes>(parts[4]), py::cast<size_t>(parts[5])};
    const auto known = [&](int place) { return place < static_cast<int>(inputs + fresh.size()); };
    TORCH_CHECK_VALUE(
        launch.words.size() == launch.places.size() && launch.words.size() <= MOST_ARGUMENTS &&
            std::all_of(launch.places.begin(), launch.places.end(), known) &&
            launch.configuration.size() <= LARGEST_CONFIGURATION &&
            (launch.launcher == 0 || launch.stream_at + sizeof(void*) <= launch.configuration.size()),
        "a launch of another form");
    plan->launches.push_back(launch);
  }
  plan->aligned = aligned;
  plan->keeps = std::shared_ptr<PyObject>(Py_NewRef(keeps.ptr()), [](PyObject* object) {
    const py::gil_scoped_acquire gil;
    Py_DECREF(object);
  });
  Plans dropped; // outside the lock: to let go of a Python object can run any code
  std::shared_ptr<const Plan> before = plan;
  const Lock lock(plans_mutex, std::try_to_lock);
  if (!lock) {
    return;
  }
  if (plans.size() >= MOST_PLANS) {
    plans.swap(dropped);
  }
  plans[std::move(key)].swap(before);
}

PyMethodDef fast_methods[] = {
    {"norm", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(norm)), METH_FASTCALL, nullptr},
    {"replays", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(replays)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};

} // namespace

PYBIND11_MODULE(RMSNORM_HOST, module) {
  PyModule_AddFunctions(module.ptr(), fast_methods);
  module.def("begin", [](const py::object& backward) { slow_backward = Py_NewRef(backward.ptr()); });
  module.def("missed", [] { return std::exchange(missed, false); });
  module.def("learn_forward", [](const py::tuple& inputs, double eps, const std::string& cast, double offset,
                                 bool with_rstd, const py::tuple& fresh, const py::tuple& launches, Word aligned,
                                 const py::object& keeps) {
    const Spec spec{cast == "early", offset == 1.0};
    learn(forward_key(all_of(inputs), eps, spec, with_rstd), 3, 3, fresh, launches, aligned, keeps);
  });
  module.def("learn_backward", [](const py::tuple& inputs, const std::string& cast, double offset, bool need_dx,
                                  bool need_dw, const py::tuple& fresh, const py::tuple& launches, Word aligned,
                                  const py::object& keeps) {
    const Spec spec{cast == "early", offset == 1.0};
    learn(backward_key(all_of(inputs), spec, need_dx, need_dw), 5, 2, fresh, launches, aligned, keeps);
  });
  module.def("forget", [] {
    Plans dropped;
    const Lock lock(plans_mutex);
    plans.swap(dropped);
  });
}
