// Two offences against routing.
bool Choose(attention::ForwardMode mode) {
  if (mode == attention::ForwardMode::kDraftExtend) return true;
  return family == KernelFamily::kDecode;
}
