#compdef sae-sweep
# eval "$(sae-sweep completion zsh)"
_sae_sweep() {
    local -a ends ends_shown goes_on goes_on_shown
    local text help
    while IFS=$'\t' read -r text help; do
        if [[ $text == *' ' ]]; then
            ends+=("${text% }") ends_shown+=("${text% }${help:+  -- $help}")
        else
            goes_on+=("$text") goes_on_shown+=("$text${help:+  -- $help}")
        fi
    done < <("${words[1]/#\~/$HOME}" complete zsh "${(@Q)words[2,CURRENT-1]}" "${(Q)PREFIX}" 2>/dev/null)
    (( $#goes_on )) && compadd -S '' -l -d goes_on_shown -a goes_on
    (( $#ends )) && compadd -l -d ends_shown -a ends
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _sae_sweep sae-sweep
