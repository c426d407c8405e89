// Functions with stacks of their own, which take turns: the threads of an emulated GPU. One thread of the system, one
// scheduler.
//
// Turns are taken by jumps. swapcontext would ask the system for the signal mask each time, which took half of an
// emulation; it only begins a fiber.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <memory>

class Fiber {
public:
    // Before the first turn; again, once it has ended.
    void begin(void (*body)(), size_t stack_bytes) {
        if (!stack_) stack_.reset(new char[stack_bytes]);
        body_ = body, begun_ = ended_ = false;
        getcontext(&context_);
        context_.uc_stack = {stack_.get(), 0, stack_bytes};
        context_.uc_link = nullptr;
        makecontext(&context_, run, 0);
    }

    // By the scheduler: a turn, until the fiber yields or ends.
    [[gnu::noinline]] void resume() {
        running = this;
        if (_setjmp(scheduler) != 0) return;
        if (begun_) _longjmp(position_, 1);
        begun_ = true;
        setcontext(&context_);
    }

    // By the fiber whose turn it is.
    [[gnu::noinline]] static void yield() {
        if (_setjmp(running->position_) == 0) _longjmp(scheduler, 1);
    }

    bool ended() const { return ended_; }

private:
    static void run() {
        running->body_();
        running->ended_ = true;
        _longjmp(scheduler, 1);
    }

    inline static Fiber* running = nullptr;
    inline static jmp_buf scheduler;

    ucontext_t context_;  // where it begins
    jmp_buf position_;    // where it goes on
    std::unique_ptr<char[]> stack_;
    void (*body_)() = nullptr;
    bool begun_ = false, ended_ = false;
};
