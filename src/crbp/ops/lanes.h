// Vectors of the processor's width, and what the convolutions do with their lanes.

#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#else
constexpr int BYTES = 32;
#endif

template <class T> struct Types {
    static constexpr int64_t W = BYTES / sizeof(T);
    typedef T V __attribute__((vector_size(BYTES)));
    typedef T Unaligned __attribute__((vector_size(BYTES), aligned(sizeof(T)), may_alias));
};

#define TYPES(T)                                     \
    [[maybe_unused]] typedef typename Types<T>::V V; \
    [[maybe_unused]] constexpr int64_t W = Types<T>::W

template <class T> typename Types<T>::V load(const T* from) {
    return *reinterpret_cast<const typename Types<T>::Unaligned*>(from);
}

template <class T> void store(typename Types<T>::V value, T* to) {
    *reinterpret_cast<typename Types<T>::Unaligned*>(to) = value;
}

// Every second lane from either vector, from lane FIRST of them on.
template <class T, int FIRST, int... K>
typename Types<T>::V merge(typename Types<T>::V x, typename Types<T>::V y, std::integer_sequence<int, K...>) {
    TYPES(T);
#ifdef __clang__
    return __builtin_shufflevector(x, y, (FIRST + K / 2 + K % 2 * W)...);
#else
    typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> I;
    typedef I Index __attribute__((vector_size(BYTES)));
    return __builtin_shuffle(x, y, Index{(FIRST + K / 2 + K % 2 * W)...});
#endif
}

int thread() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

template <class T> typename Types<T>::V* aligned(T* scratch) {
    return reinterpret_cast<typename Types<T>::V*>((reinterpret_cast<uintptr_t>(scratch) + BYTES - 1) / BYTES * BYTES);
}

}  // namespace
