// What torch's dispatcher calls in place of Python: arguments are checked, outputs allocated and the
// functions of cpu.cpp called, through torch's stable C interface.  Included by an operation's
// call.cpp, which is built for every processor and holds no arithmetic.  (.hpp: cpu.cpp's headers
// end in .h, and a change of one builds every kernel anew.)
//
// Refusing is an exception of one sentence; which argument is wrong is said by Python's checks.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <torch/csrc/stable/c/shim.h>

#define EXPORTED extern "C" __attribute__((visibility("default")))

extern const char* const OPERATOR;       // "rms_norm.cpu"
EXPORTED const char* const symbols[];  // functions of cpu.cpp, ended by a null pointer
constexpr int MOST_SYMBOLS = 8, MOST_DIMENSIONS = 64;
static std::atomic<void*> bound[MOST_SYMBOLS];  // their addresses, or null: not yet, or no longer
static void (*ask_for_them)() = nullptr;

// Begins with the operation's name, by which Python knows that it is all there is to say.
[[noreturn]] inline void refuse(const std::string& sentence) {
    const std::string name(OPERATOR);
    throw std::runtime_error(name.substr(0, name.find('.')) + " " + sentence);
}
[[noreturn]] inline void refuse() {
    throw std::runtime_error("study::" + std::string(OPERATOR) +
                             " does not take these arguments; the function of its name in kernels "
                             "says why");
}
inline void expect(bool holds) {
    if (!holds) refuse();
}
inline void torch_did(AOTITorchError error) { expect(error == AOTI_TORCH_SUCCESS); }

// `symbols[i]` for the current instruction set.
template <class Function> inline Function* kernel(int i) {
    void* address = bound[i].load(std::memory_order_acquire);
    if (!address) {
        ask_for_them();
        address = bound[i].load(std::memory_order_acquire);
        expect(address);
    }
    return reinterpret_cast<Function*>(address);
}

inline int threads() {
    uint32_t count = 1;
    torch_did(torch_get_num_threads(&count));
    return int(count);
}

struct Rows { int64_t count, step, n; };  // step: elements from one row's start to the next

// An argument, or an output on its way: owns torch's handle.  Without one: None, at no address.
struct Tensor {
    AtenTensorHandle handle = nullptr;
    int64_t dim = 0, numel = 0, *sizes = nullptr, *strides = nullptr;
    int32_t dtype = -1, device = -1;
    void* data = nullptr;

    Tensor() = default;
    explicit Tensor(AtenTensorHandle owned) : handle(owned) {
        torch_did(aoti_torch_get_dim(handle, &dim));
        torch_did(aoti_torch_get_numel(handle, &numel));
        torch_did(aoti_torch_get_sizes(handle, &sizes));
        torch_did(aoti_torch_get_strides(handle, &strides));
        torch_did(aoti_torch_get_dtype(handle, &dtype));
        torch_did(aoti_torch_get_device_type(handle, &device));
        torch_did(aoti_torch_get_data_ptr(handle, &data));
    }
    Tensor(const Tensor&) = delete;
    ~Tensor() {
        if (handle) aoti_torch_delete_tensor_object(handle);
    }
    int64_t last() const { return sizes[dim - 1]; }
    bool like(const Tensor& x) const { return dtype == x.dtype && device == x.device; }
    bool shaped(std::initializer_list<int64_t> shape) const {
        return dim == int64_t(shape.size()) && std::equal(shape.begin(), shape.end(), sizes);
    }
    bool same_shape(const Tensor& x) const {
        return dim == x.dim && !std::memcmp(sizes, x.sizes, size_t(dim) * sizeof *sizes);
    }
    bool contiguous() const {
        int64_t step = 1;
        for (int64_t i = dim - 1; numel && i >= 0; step *= sizes[i--])
            if (sizes[i] != 1 && strides[i] != step) return false;
        return true;
    }
    // A contiguous vector with an element for each of x's last dimension.
    bool spans(const Tensor& x) const {
        return dim == 1 && sizes[0] == x.last() && like(x) && contiguous();
    }
    bool last_is_dense() const { return strides[dim - 1] == 1 || last() <= 1; }
    // 0, 1, 2 for float32, bfloat16, float16, as an operation lists its symbols.
    int kind() const {
        static const int32_t real[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(),
                                       aoti_torch_dtype_float16()};
        for (int i = 0; i < 3; ++i)
            if (dtype == real[i]) return i;
        refuse();
    }
    // As `rows_of` in kernels/op.py: the last dimension dense, the rows evenly spaced.
    Rows rows() const {
        expect(dim >= 1);
        const int64_t n = last();
        int64_t count = 1, step = -1;
        if (contiguous()) {
            for (int64_t i = 0; i < dim - 1; ++i) count *= sizes[i];
            return {count, n, n};
        }
        expect(last_is_dense());
        for (int64_t i = dim - 2; i >= 0; --i) {
            if (sizes[i] == 1) continue;
            if (step < 0) step = strides[i];
            expect(strides[i] == count * step);
            count *= sizes[i];
        }
        return {count, step < 0 ? n : step, n};
    }
};

// Arguments are taken from the stack into our ownership; outputs are put in their place.
struct Arguments {
    StableIValue* stack;
    Tensor tensor(int i) const { return Tensor(get<AtenTensorHandle>(i)); }
    Tensor optional_tensor(int i) const {  // its handle stands in memory that is ours, too
        auto* const holder = get<StableIValue*>(i);
        if (!holder) return Tensor();
        AtenTensorHandle handle;
        std::memcpy(&handle, holder, sizeof handle);
#if defined(TORCH_VERSION_2_13_0) && TORCH_FEATURE_VERSION >= TORCH_VERSION_2_13_0
        torch_did(torch_delete_stable_ivalue(holder));
#else
        delete holder;
#endif
        return Tensor(handle);
    }
    double number(int i) const { return get<double>(i); }
    int64_t integer(int i) const { return get<int64_t>(i); }
    bool flag(int i) const { return get<bool>(i); }
    std::string text(int i) const {
        const auto owned = get<StringHandle>(i);
        const char* characters = nullptr;
        torch_did(torch_string_c_str(owned, &characters));
        std::string copy(characters);
        torch_delete_string(owned);
        return copy;
    }
    void give(int i, Tensor& y) const {
        stack[i] = 0;
        std::memcpy(stack + i, &y.handle, sizeof y.handle);
        y.handle = nullptr;
    }

  private:
    template <class T> T get(int i) const {
        T value;
        std::memcpy(&value, stack + i, sizeof value);
        return value;
    }
};

inline Tensor empty(const int64_t* sizes, int64_t dim, int32_t dtype) {  // contiguous
    int64_t strides[MOST_DIMENSIONS], step = 1;
    expect(dim <= MOST_DIMENSIONS);
    for (int64_t i = dim - 1; i >= 0; --i) {
        strides[i] = step;
        step *= sizes[i] > 1 ? sizes[i] : 1;
    }
    AtenTensorHandle made;
    torch_did(aoti_torch_empty_strided(dim, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0,
                                       &made));
    return Tensor(made);
}
inline Tensor empty_like(const Tensor& x) { return empty(x.sizes, x.dim, x.dtype); }

void call(Arguments arguments);  // the operation, in its call.cpp

static void boxed(StableIValue* stack, uint64_t, uint64_t) { call({stack}); }

// `ask` binds all symbols when a kernel is wanted and has no address.  Returns 0 when it went well.
EXPORTED int install(void (*ask)()) {
    ask_for_them = ask;
    TorchLibraryHandle library;  // never let go: the registration lasts as long as it
    return aoti_torch_library_init_impl("study", "CPU", __FILE__, __LINE__, &library) ||
           aoti_torch_library_impl(library, OPERATOR, boxed);
}
EXPORTED void bind_symbol(int i, void* address) {
    bound[i].store(address, std::memory_order_release);
}
